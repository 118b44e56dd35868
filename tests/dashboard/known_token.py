"""The secret that the tests' dashboards ask for."""

TOKEN = "a-token-for-tests"
