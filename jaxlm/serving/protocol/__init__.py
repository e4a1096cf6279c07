"""The wire format: schemas of requests and responses, errors, events, and the OpenAPI document."""
