"""Configuration: frozen values (`settings`), the steering policy and its TOML form (`policy`), and the only reader of
command-line flags and environment variables (`flags`)."""
