"""Native kernels: C without torch's headers, compiled once, and the torch operators around them."""
