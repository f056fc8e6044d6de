"""Published weights, weight files of fpnx and other frameworks, and the recipes that belong to them."""
