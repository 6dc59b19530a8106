"""What a run records about itself: metrics, TensorBoard, W&B, goodput, profiler traces, charts."""
