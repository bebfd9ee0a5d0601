"""Network, device and options → how the network runs."""
