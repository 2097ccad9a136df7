"""How operators carry labels: small pure functions, and a table of each kind."""
