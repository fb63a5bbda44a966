"""People rank answers on a local page: what they are shown, what they say, what becomes of it."""
