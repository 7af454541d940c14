"""What the network computes, one file a layer type; start at taipan.py."""
