"""HTTP server: OpenAI's API, Megatron-LM's API, the demo page, and the thread that drives the engine."""
