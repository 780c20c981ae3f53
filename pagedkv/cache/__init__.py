"""The cache objects that users and models hold."""
