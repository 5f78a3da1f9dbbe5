"""Dense and packed weights, and the linear layer that holds them."""
