"""Inputs from the network, and which addresses may be contacted."""
