"""An OpenAI-compatible server over the engine, and a load generator for any such server."""
