"""Clients of servers with OpenAI's API."""
