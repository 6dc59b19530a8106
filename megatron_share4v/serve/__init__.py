"""The demo server: OpenAI's API over HTTP, its page, and the thread that drives the engine."""
