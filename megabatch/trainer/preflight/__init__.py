"""What each node of an allocation is asked before the ranks start: is it as good as its peers?"""
