"""Views: how a raw sample becomes what a tower sees, with the randomness that training wants."""
