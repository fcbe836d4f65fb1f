"""Drop-ins under the names and signatures of the libraries people call today; neither library is imported."""
