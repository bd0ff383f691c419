"""Code that runs in the API server: requests are read, planned, counted and answered."""
