"""HTML pages: of a run and its metrics, and of the data that training will see."""
