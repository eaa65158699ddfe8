"""The view of a run as it goes: progress, metrics, TensorBoard, profiles, evaluations on the way."""
