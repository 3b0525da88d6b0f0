"""Merged model folders and their proof."""
