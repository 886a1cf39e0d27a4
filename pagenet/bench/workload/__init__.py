"""How a program fares that works on memory while it comes, and how its touches are recorded."""
