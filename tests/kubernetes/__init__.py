"""The Kubernetes example against the schemas of a release."""
