"""Images of requests: fetched, checked and decoded outside the event loop."""
