"""Rows of data sets as they are written, and the chats in them: the same for every family that reads text."""
