"""The API server's side: requests are read, planned, counted and answered."""
