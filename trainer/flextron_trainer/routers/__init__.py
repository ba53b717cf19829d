"""How routers learn which sizes to choose for a budget."""
