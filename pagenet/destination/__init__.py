"""The side that fills memory: a session with a source, the map of pages, and the lanes that ask,
receive and place."""
