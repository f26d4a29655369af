"""The messages of the contract, generated from proto/certiq/v1 when the package is built."""
