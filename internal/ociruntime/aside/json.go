package aside

// members goes through the members of the JSON object that data is. It calls visit
// with each one's name and value, as they are written, and ends when that returns
// false. It returns whether it got to the end and everything on the way was plain: a
// name with a backslash in it may spell anything, and is not.
//
// It does not look into values further than to their end. Whether they are JSON is
// for whoever reads them: nothing is taken from them but where the next name is, and
// every reader of JSON that takes the data at all finds the same names.
func members(data []byte, visit func(name string, value []byte) bool) bool {
	i := space(data, 0)
	if i == len(data) || data[i] != '{' {
		return false
	}
	i = space(data, i+1)
	if i < len(data) && data[i] == '}' {
		return space(data, i+1) == len(data)
	}
	for {
		end, escaped := quoted(data, i)
		if end < 0 || escaped {
			return false
		}
		name := string(data[i+1 : end-1])
		if i = space(data, end); i == len(data) || data[i] != ':' {
			return false
		}
		i = space(data, i+1)
		if end = value(data, i); end < 0 {
			return false
		}
		if !visit(name, data[i:end]) {
			return false
		}
		if i = space(data, end); i == len(data) {
			return false
		}
		switch data[i] {
		case '}':
			return space(data, i+1) == len(data)
		case ',':
			i = space(data, i+1)
		default:
			return false
		}
	}
}

// plain is the text of a string without escapes; empty for all else.
func plain(data []byte) string {
	end, escaped := quoted(data, 0)
	if end != len(data) || escaped {
		return ""
	}
	return string(data[1 : end-1])
}

func space(data []byte, i int) int {
	for i < len(data) && (data[i] == ' ' || data[i] == '\n' || data[i] == '\t' || data[i] == '\r') {
		i++
	}
	return i
}

// quoted returns where the string that begins at i ends, -1 if none does, and whether
// there is an escape in it.
func quoted(data []byte, i int) (end int, escaped bool) {
	if i >= len(data) || data[i] != '"' {
		return -1, false
	}
	for i++; i < len(data); i++ {
		switch data[i] {
		case '"':
			return i + 1, escaped
		case '\\':
			escaped = true
			i++
		}
	}
	return -1, escaped
}

// value returns where the value that begins at i ends; -1 if it does not.
func value(data []byte, i int) int {
	depth := 0
	for begin := i; i < len(data); {
		switch data[i] {
		case '"':
			end, _ := quoted(data, i)
			if end < 0 {
				return -1
			}
			i = end
			if depth == 0 {
				return i
			}
			continue
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return after(begin, i)
			}
			if depth--; depth == 0 {
				return i + 1
			}
		case ',', ' ', '\n', '\t', '\r':
			if depth == 0 {
				return after(begin, i)
			}
		}
		i++
	}
	return -1
}

// after is the end of a value that something else ended; there must be one.
func after(begin, end int) int {
	if begin == end {
		return -1
	}
	return end
}
