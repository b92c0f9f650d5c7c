"""What an integration with a framework is built on."""
