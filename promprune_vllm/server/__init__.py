"""What the HTTP server says about visual tokens; knows neither vLLM nor torch."""
