"""Migrations of a running guest, by QEMU's own means and by pagenet's."""
