"""`chunkwise bench`: this server beside other engines, taking turns in one run. No serving process imports it."""
