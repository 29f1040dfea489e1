"""What runs the model. Importing this package costs nothing: backends load inside their factories."""
