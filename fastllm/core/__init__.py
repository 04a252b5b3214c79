"""The building blocks of a model: parameters, shapes, and calls into the operations."""
