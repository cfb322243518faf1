"""The HTTP doors: request bodies in, JSON or server-sent events out. All serving state is in `serving.Serving`."""
