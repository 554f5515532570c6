"""Trackers: TensorBoard, Trackio, Weights & Biases and MLflow beside `metrics.jsonl`."""
