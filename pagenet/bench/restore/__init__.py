"""Guests restored by one daemon: out of its source's memory, and out of a store."""
