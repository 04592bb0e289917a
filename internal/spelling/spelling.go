// Package spelling finds what somebody meant who wrote something else.
package spelling

import "strings"

// maxDistance is how many bytes may be wrong: with more, a guess is none.
const maxDistance = 2

// Nearest returns that of the known words which takes the fewest insertions, deletions and
// replacements of bytes to get to from word, upper and lower case being the same, or "" if it
// takes more than two. Of words that are equally near it returns the first.
func Nearest(word string, known []string) string {
	best, nearest := maxDistance+1, ""
	for _, k := range known {
		if d := distance(strings.ToLower(word), strings.ToLower(k)); d < best {
			best, nearest = d, k
		}
	}
	return nearest
}

// distance is the number of bytes to insert, delete or replace to get from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j]+1, row[j+1]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
