"""An OpenAI-compatible HTTP server for one model (`afnext serve`)."""
