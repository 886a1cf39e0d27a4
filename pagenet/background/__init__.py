"""Policy of the destination's background: the order and pace of pages that no thread waits for, and
when fetching them begins."""
