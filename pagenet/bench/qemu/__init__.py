"""How a running guest fares that moves, by QEMU's own means and by pagenet's."""
