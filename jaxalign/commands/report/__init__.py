"""HTML pages on runs and their metrics, and on the data that training will see."""
