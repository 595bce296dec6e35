"""The embedded world: scenes drawn from captions, their exact detector, and the recipes that train on them."""
