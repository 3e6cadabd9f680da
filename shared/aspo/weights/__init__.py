"""The weight plane: immutable versions, a content-addressed store, and the client that pulls and verifies."""
