"""Low-rank layers: drop-in subclasses of torch's, whose weight is the product of two factors."""
