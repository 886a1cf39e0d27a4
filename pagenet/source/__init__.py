"""The side that has the pages: the memory that is read, the sessions with destinations, and the
lanes that answer them."""
