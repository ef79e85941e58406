"""The search for a recipe: how much each layer costs in quality, and which layers get which bits."""
