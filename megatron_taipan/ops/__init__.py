"""Mathematics with more than one implementation: a plain torch reference beside each fast kernel."""
