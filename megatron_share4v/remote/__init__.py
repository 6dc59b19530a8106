"""Models behind an address: servers that speak OpenAI's interface, ours and others."""
