"""Process groups, collectives as autograd functions, sharded layers, and the table of every parameter."""
